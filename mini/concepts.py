"""The words of the miniature world: 8 objects, 45 attributes in six edit types, and the sentences made of them.

The renderer draws them, the persona maker likes and dislikes them, the captions and instructions name them.
The six edit-type names and this choice of 45 are ours (the paper lists neither; its user study used "45 concepts").
No attribute's name contains another's, so that an instruction names an attribute exactly when it contains the name.
"""
OBJECTS = ["apple", "mug", "bag", "teddy bear", "bowl", "vase", "chair", "lamp"]      # the first five: the paper's user study
COLORS = ["white", "grey", "beige", "brown", "blue", "maroon"]                        # of an unedited object
WALLS = ["grey", "cream", "mint", "lilac"]                                            # of an unedited scene

ATTRIBUTES = {   # edit type -> attributes
    "color": ["red", "orange", "yellow", "neon green", "turquoise", "navy", "purple", "hot pink", "black", "olive"],
    "pattern": ["stripes", "polka dots", "checkers", "rainbow", "zigzag", "stars", "leopard spots", "hearts"],
    "material": ["wood", "gold", "chrome", "marble", "glass", "lava", "ice"],
    "background": ["forest", "beach", "desert", "snow", "night sky", "sunset", "city", "ocean"],
    "lighting": ["candlelight", "moonlight", "neon light", "spotlight", "dusk light", "studio light"],
    "object": ["butterfly", "flower", "balloon", "crown", "party hat", "leaf"],
}
TYPE_OF = {a: t for t, names in ATTRIBUTES.items() for a in names}

TEMPLATES = {    # edit type -> ways to ask; the first halves are shared between attributes, as in real instructions
    "color": ["Paint the {o} {a}", "Make the {o} {a}", "Turn the {o} {a}", "Change the color of the {o} to {a}"],
    "pattern": ["Cover the {o} with {a}", "Give the {o} a pattern of {a}", "Decorate the {o} with {a}", "Put {a} on the {o}"],
    "material": ["Make the {o} out of {a}", "Turn the {o} into {a}", "Rebuild the {o} in {a}", "Change the material of the {o} to {a}"],
    "background": ["Change the background to {a}", "Place the {o} in front of {a}", "Set the scene with {a} behind the {o}", "Replace the wall with {a}"],
    "lighting": ["Light the {o} with {a}", "Use {a} for the scene", "Change the lighting to {a}", "Show the {o} in {a}"],
    "object": ["Add a {a} next to the {o}", "Put a {a} beside the {o}", "Place a {a} near the {o}", "Add a {a} to the scene"],
}

GUIDANCE = ["with {a}", "{a}", "something with {a}", "use {a}", "I want {a}", "please try {a}"]       # what a user may add in words; also "change the" edit type

def caption(color, obj, wall):
    """"A white bowl in front of a grey wall": what a person would write under the unedited picture."""
    return f"A {color} {obj} in front of a {wall} wall"

def instruction(obj, attribute, which):
    """The `which`-th way to ask for `attribute` on `obj`."""
    return TEMPLATES[TYPE_OF[attribute]][which].format(o=obj, a=attribute)
