"""The images of the demo set: photographs from the scikit-image and scikit-learn wheels, and drawn signs.

Captions are written by hand. Licences are those given per file by `skimage.data` and scikit-learn's image folder.
"""

from dataclasses import dataclass

from data_pipeline.records.schema import Caption

CC0 = "CC0 1.0"
PUBLIC_DOMAIN = "public domain"
UNRESTRICTED = "no known copyright restrictions"
OWN = "Apache-2.0, rendered by qi2"


@dataclass(frozen=True)
class Photo:
    """A photograph: a part of a file in a wheel, and how it is stored.

    Attributes:
      name: file name in the demo set; the suffix determines the format.
      package: package of the original.
      path: path of the original inside the package.
      licence: licence with credit.
      box: (left, top, right, bottom) in pixels of the original; None for the whole image.
      turned: whether the pixels are stored sideways, with the EXIF orientation that sets them upright.
    """

    name: str
    package: str
    path: str
    captions: tuple[Caption, ...]
    licence: str
    box: tuple[int, int, int, int] | None = None
    turned: bool = False


@dataclass(frozen=True)
class Sign:
    """Words on a plain background, rendered with Pillow's built-in font.

    Attributes:
      size: (width, height) in pixels.
      ground: colour of the background, or "transparent".
      lines: tuples of text, letter height in pixels, colour, and centre as fractions of width and height.
      angle: rotation in degrees, counter-clockwise.
      frame: colour of a border line; None for no border.
    """

    name: str
    size: tuple[int, int]
    ground: str
    lines: tuple[tuple[str, int, str, tuple[float, float]], ...]
    caption: str
    angle: float = 0.0
    frame: str | None = None


def _general(text: str, *more: Caption) -> tuple[Caption, ...]:
    return (Caption(text, "general", "en"), *more)


def _knowledge(text: str) -> Caption:
    return Caption(text, "knowledge", "en")


_SK, _LEARN = "skimage", "sklearn"

PHOTOS = (
    Photo(
        "astronaut.png",
        _SK,
        "data/astronaut.png",
        _general(
            "A smiling woman with short light brown hair wears an orange space suit and holds a black helmet; behind "
            "her stand a flag and a model of a space shuttle.",
            _knowledge("NASA portrait of the astronaut Eileen Collins with a model of the Space Shuttle."),
            Caption("The round patch on the suit carries the names of a shuttle crew.", "text", "en"),
        ),
        f"{PUBLIC_DOMAIN}, NASA",
    ),
    Photo(
        "brick.png",
        _SK,
        "data/brick.png",
        _general("Grey paving of long narrow bricks with light joints, running away from the viewer."),
        CC0,
        box=(60, 0, 444, 512),
    ),
    Photo(
        "camera.png",
        _SK,
        "data/camera.png",
        _general(
            "Black-and-white photograph of a man in a dark coat who bends to a camera on a tripod in a field.",
            Caption(
                "Schwarzweißfoto: ein Mann im dunklen Mantel blickt durch eine Kamera auf einem Stativ.", language="de"
            ),
        ),
        f"{CC0}, Lav Varshney",
        box=(0, 30, 330, 512),
    ),
    Photo(
        "cell.png",
        _SK,
        "data/cell.png",
        _general(
            "Microscope picture of one round bright cell on a dark grey, faintly striped ground.",
            _knowledge("Quantitative phase image of a single cell floating in saline."),
        ),
        f"{CC0}, Paul Müller et al.",
        box=(262, 0, 550, 512),
    ),
    Photo(
        "chelsea.png",
        _SK,
        "data/chelsea.png",
        _general(
            "Close-up of a tabby cat's face with green eyes, an orange nose and long white whiskers.",
            Caption("一只虎斑猫的脸部特写，绿色的眼睛，橙色的鼻子。", "general", "zh-Hans"),
        ),
        f"{CC0}, Stéfan van der Walt",
    ),
    Photo(
        "clock.png",
        _SK,
        "data/clock_motion.png",
        _general("A round wall clock smeared sideways by a moving camera, white on a plain grey wall."),
        f"{PUBLIC_DOMAIN}, Stéfan van der Walt",
    ),
    Photo(
        "coffee.png",
        _SK,
        "data/coffee.png",
        _general(
            "An espresso in a red and white cup on a red saucer with a small spoon, on a wooden table.",
            Caption(
                '{"subject": "espresso", "objects": ["red cup", "red saucer", "spoon"], "surface": "wood"}',
                "structured",
            ),
        ),
        f"{CC0}, Rachel Michetti, Pikolo Espresso Bar",
    ),
    Photo(
        "coins.png",
        _SK,
        "data/coins.png",
        _general(
            "Four rows of six old coins with worn heads and figures, grey on a dark ground.",
            _knowledge("Greek coins found in Pompeii."),
        ),
        f"{UNRESTRICTED}, Brooklyn Museum",
        box=(0, 0, 384, 288),
    ),
    Photo(
        "flower.jpg",
        _LEARN,
        "datasets/images/flower.jpg",
        _general(
            "One peach-coloured dahlia with tightly layered petals in front of blurred dark green leaves.",
            Caption("Eine pfirsichfarbene Dahlie vor unscharfen dunkelgrünen Blättern.", "general", "de"),
        ),
        "CC BY 2.0, vultilion (flickr)",
    ),
    Photo(
        "horse.png",
        _SK,
        "data/horse.png",
        _general("Black silhouette of a standing horse, seen from the side, facing right, on white."),
        f"{CC0}, Andreas Preuss",
    ),
    Photo(
        "hubble.jpg",
        _SK,
        "data/hubble_deep_field.jpg",
        _general(
            "Hundreds of small galaxies in white, orange and blue scattered over a black sky.",
            _knowledge("The Hubble eXtreme Deep Field, among the farthest views of the universe in visible light."),
        ),
        f"{PUBLIC_DOMAIN}, NASA",
        box=(0, 150, 1000, 712),
    ),
    Photo(
        "lake.jpg",
        _LEARN,
        "datasets/images/china.jpg",
        _general(
            "View over green treetops and a tall tree on the right to a pale lake with small boats and a far shore."
        ),
        "CC BY 2.0, danielbuechele (flickr)",
        box=(360, 130, 640, 410),
    ),
    Photo(
        "pagoda.jpg",
        _LEARN,
        "datasets/images/china.jpg",
        _general(
            "A many-sided Chinese tower with red columns and four roofs of orange and green tiles above trees.",
            _knowledge("The Tower of Buddhist Incense in the Summer Palace in Beijing."),
        ),
        "CC BY 2.0, danielbuechele (flickr)",
        box=(60, 10, 360, 427),
        turned=True,
    ),
    Photo(
        "retina.jpg",
        _SK,
        "data/retina.jpg",
        _general(
            "A round orange-red disc on black, crossed by branching blood vessels, with a yellow spot at the left.",
            _knowledge("Fundus photograph of a healthy left retina with the optic disc and the macula."),
        ),
        f"{CC0}, Mikael Häggström",
    ),
    Photo(
        "rocket.jpg",
        _SK,
        "data/rocket.jpg",
        _general(
            "A white rocket stands upright between lattice towers under a dark blue evening sky; lamps shine below.",
            _knowledge("A SpaceX Falcon 9 with the DSCOVR satellite on its launch pad at Cape Canaveral."),
        ),
        f"{PUBLIC_DOMAIN}, SpaceX",
        box=(185, 0, 457, 427),
    ),
    Photo(
        "tissue.png",
        _SK,
        "data/ihc.png",
        _general(
            "Microscope picture of stained tissue: brown glands with fine lines between pale blue cells.",
            _knowledge("Colonic glands with immunohistochemical staining of FHL2 in brown and haematoxylin in blue."),
        ),
        UNRESTRICTED,
        box=(0, 0, 512, 340),
    ),
)

SIGNS = (
    Sign(
        "sign-bread.png",
        (640, 360),
        "#f3e6cf",
        (("Fresh", 110, "#6b3a12", (0.36, 0.30)), ("Bread", 110, "#a8541c", (0.62, 0.68))),
        'Brown letters on cream, in two steps: "Fresh" and below it, further right, "Bread".',
    ),
    Sign(
        "sign-exit.png",
        (288, 512),
        "#0b6b3a",
        (("EXIT", 90, "white", (0.5, 0.2)), ("12", 190, "#ffe14d", (0.5, 0.62))),
        'A tall green sign with white "EXIT" at the top and a large yellow "12" below.',
    ),
    Sign(
        "sign-hello.png",
        (512, 384),
        "#14213d",
        ((">", 60, "#7a8590", (0.08, 0.2)), ("Hello, world!", 60, "#5dff8a", (0.52, 0.2))),
        'A dark blue screen with one line at the top: a grey ">" and the green words "Hello, world!".',
    ),
    Sign(
        "sign-open.png",
        (512, 512),
        "#c21f2b",
        (("OPEN", 150, "white", (0.5, 0.5)),),
        'A red square with the white word "OPEN" in the middle.',
    ),
    Sign(
        "sign-paint.png",
        (480, 320),
        "#ff9d2e",
        (("Wet paint", 88, "#1b1b1b", (0.5, 0.5)),),
        'Orange ground with the black words "Wet paint", tilted upwards to the right.',
        angle=16,
    ),
    Sign(
        "sign-quiet.png",
        (384, 512),
        "#1c3f94",
        (("Quiet", 110, "white", (0.5, 0.36)), ("please", 100, "white", (0.5, 0.6))),
        'A blue notice in a white frame with the white words "Quiet please" on two lines.',
        frame="white",
    ),
    Sign(
        "sign-room.png",
        (320, 480),
        "#c9ccd1",
        (("Room", 56, "#40454c", (0.32, 0.14)), ("204", 150, "#14171a", (0.5, 0.84))),
        'A light grey door plate: small "Room" at the top left, large "204" at the bottom.',
    ),
    Sign(
        "sign-sale.png",
        (864, 288),
        "#8e1b8a",
        (("SALE 50% OFF", 112, "#ffd400", (0.5, 0.5)),),
        'A wide purple banner with the yellow words "SALE 50% OFF".',
    ),
    Sign(
        "sign-tea.png",
        (288, 864),
        "#0f6c73",
        (("T", 220, "#e6f6d8", (0.5, 0.18)), ("E", 220, "#e6f6d8", (0.5, 0.5)), ("A", 220, "#e6f6d8", (0.5, 0.82))),
        'A tall teal banner with the letters "T", "E", "A" one below the other.',
    ),
    Sign(
        "sign-yes.png",
        (400, 400),
        "transparent",
        (("Yes!", 190, "#7b2cbf", (0.5, 0.5)),),
        'The purple word "Yes!" on a transparent ground.',
        angle=-8,
    ),
)
