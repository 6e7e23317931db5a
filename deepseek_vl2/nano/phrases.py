"""The words of nano's questions and answers, in English and Chinese."""

from types import MappingProxyType

from deepseek_vl2.models.special_tokens import GROUNDING, REF_END, REF_START
from deepseek_vl2.nano.scenes import COLOR_NAMES, SHAPE_NAMES

# A label inside ref marks, as the reference's README asks for an object, and plain forms.
MARKED_LOCATE = ("{}.", "{}", "Locate {}.", "Find {}.", "Where is {}?", "Point to {}.")
PLAIN_LOCATE = ("Locate {}.", "Find {}.", "Where is {}?", "Show me {}.", "Point to {}.", "Draw a box around {}.")
MARKED_LOCATE_ZH = ("{}", "{}。", "找到{}", "找到{}。", "请找到{}。", "定位{}", "{}在哪里？")
PLAIN_LOCATE_ZH = ("找到{}。", "请找到{}。", "定位{}。", "{}在哪里？", "框出{}。")
# "{}" is a plural ("red circles"), "{one}" the singular; a label inside ref marks too, as in the reference's examples.
LOCATE_ALL = (
    "Locate all {}.",
    "Find all {}.",
    "Where are the {}?",
    "Find every {one}.",
    "Locate every {one}.",
    f"Find all the {REF_START}{{}}{REF_END}",
    f"Locate all the {REF_START}{{}}{REF_END}.",
)
COUNT = (
    "How many {} are there?",
    "How many {} are in the picture?",
    "How many {} can you see?",
    "How many {} do you see?",
    "How many {} are there in the image?",
    "Count the {}.",
    "Count the {} in the picture.",
)
COLOR = (
    "What color is the {}?",
    "What colour is the {}?",
    "Which color is the {}?",
    "Which colour has the {}?",
    "What color does the {} have?",
    "What is the color of the {}?",
    "What is the colour of the {}?",
    "Name the color of the {}.",
)
SHAPE = (
    "What shape is the {}?",
    "Which shape is the {}?",
    "What is the shape of the {}?",
    "Which shape has the {}?",
    "Name the shape of the {}.",
)
DESCRIBE = (
    f"{GROUNDING}Describe the picture.",
    f"{GROUNDING}Describe the image.",
    f"{GROUNDING}Describe this image.",
    f"{GROUNDING}What is in the picture?",
    f"{GROUNDING}What do you see?",
    "Name every object with its box.",
    "List all objects with their boxes.",
    "Detect all objects.",
)
PARTS = (
    "Describe each part of this image in detail.",
    "Describe this picture part by part.",
    "Describe the picture part by part.",
    "Describe each part of this picture.",
)
READ_WORD = (
    "What word is printed?",
    "Which word is printed in the picture?",
    "Read the word.",
    "What does the word say?",
    "What word is it?",
)
READ_NUMBER = (
    "What number is printed?",
    "Which number is printed in the picture?",
    "Read the number.",
    "What number do you see?",
    "What number is it?",
)
READ_TEXT = ("Read the text.", "What is written in the picture?", "What does the text say?", "What is printed?")
READ_ALL = ("Read all texts.", "Read everything in the picture.", "Read all words and numbers.")
TABLE = (
    "What is the value for {row} in column {column}?",
    "What is in row {row}, column {column}?",
    "Which number is in column {column} for {row}?",
    "What does the table say for {row} in column {column}?",
    "Read the value of {row} in column {column}.",
)
BAR = (
    "What is the value of {}?",
    "What value has {}?",
    "How high is {}?",
    "Which value does {} show?",
    "Read the value of {}.",
)
# What somebody wants, "{}" a colour or what a shape is like, and what to take.
WISH_COLOR = (
    f"{GROUNDING}I want something {{}}, what should I take?",
    f"{GROUNDING}I need something {{}}. Which one should I take?",
    f"{GROUNDING}I am looking for something {{}}. Can you help me?",
)
WISH_SHAPE = (
    f"{GROUNDING}I want something {{}}, what should I take?",
    f"{GROUNDING}I need a thing {{}}. Which one should I take?",
    f"{GROUNDING}I am looking for a thing {{}}. Can you help me?",
)
WISHES = MappingProxyType(
    {
        "circle": "that can roll",
        "square": "with four equal sides",
        "triangle": "with three corners",
        "star": "that shines at night",
        "cross": "that looks like a plus",
        "diamond": "that looks like a kite",
    }
)
WISH_ANSWER = ("Take the ", ".")
IN_CONTEXT = (
    f"{GROUNDING}In the first image, an object within the red rectangle is marked. "
    "Locate the object of the same category in the second image.",
    f"{GROUNDING}In the first image, an object is marked with a red rectangle. "
    "Find the object of the same category in the second image.",
    f"{GROUNDING}An object in the first image is marked. Locate the same kind of object in the second image.",
)
COMPARE_WHICH = (
    "Which image shows a {}?",
    "Which image has a {}?",
    "In which image is a {}?",
    "Which picture shows a {}?",
)
COMPARE_COUNT = ("How many {} are in image_{number}?", "How many {} are there in image_{number}?")
COMPARE_SHAPE = ("What shape is the {} object in image_{number}?",)
COMPARE_COLOR = ("What color is the {} in image_{number}?",)
COMPARE_LIST = (
    "Can you tell me what are in the images?",
    # With the space of the README's example.
    " Can you tell me what are in the images?",
    "What is in the images?",
    "Compare the images.",
    "What does each image show?",
)
FOLLOW_LOCATE = ("Where is it?", "Locate it.", "Find it.", "Show me where it is.")
FOLLOW_COLOR = ("What color is it?", "What colour is it?", "Which color has it?")
FOLLOW_SHAPE = ("What shape is it?", "Which shape is it?", "What is its shape?")

# Names of any shape of a colour.
ANY_SHAPE = ("object", "one", "shape")

COLORS_ZH = MappingProxyType(
    {
        "red": "红色",
        "orange": "橙色",
        "yellow": "黄色",
        "green": "绿色",
        "cyan": "青色",
        "blue": "蓝色",
        "purple": "紫色",
        "black": "黑色",
    }
)
SHAPES_ZH = MappingProxyType(
    {
        "circle": "圆形",
        "square": "正方形",
        "triangle": "三角形",
        "star": "五角星",
        "cross": "十字",
        "diamond": "菱形",
    }
)
ANY_SHAPE_ZH = ("图形", "物体")

COLUMN_PLACES = ("left", "center", "right")
ROW_PLACES = ("Top", "Middle", "Bottom")


def plural(noun: str) -> str:
    """The plural of a shape's name or of "object"."""
    return noun + ("es" if noun.endswith("s") else "s")


def described_zh(color: str, shape: str | None) -> str:
    """A shape of a colour, or any shape of it, in Chinese."""
    return f"{COLORS_ZH[color]}的{SHAPES_ZH[shape] if shape else ANY_SHAPE_ZH[0]}"


def row_in_words(row: str) -> str:
    """The name of a table's row as questions write it: "Mon" for "MON"."""
    return row.capitalize()


def _check_names() -> None:
    if set(COLORS_ZH) != set(COLOR_NAMES) or not set(SHAPES_ZH) == set(WISHES) == set(SHAPE_NAMES):
        raise RuntimeError("every colour and shape needs its Chinese name, and every shape what it is wished for")


_check_names()
