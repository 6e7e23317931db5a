"""Questions with pictures: where the pictures stand in the text."""

from deepseek_vl2.models.special_tokens import GROUNDING, IMAGE

# Asked about pictures that come without a question.
DESCRIBE_PICTURE = f"{GROUNDING}Describe the picture."


def place_image_marks(question: str, num_pictures: int) -> str:
    """Puts one mark a picture in front of a question that has none.

    Args:
        question: Text of a user; `<image>` marks the places of its pictures.
        num_pictures: Pictures that come with it.

    Raises:
        ValueError: If there are marks, but not as many as pictures.
    """
    if IMAGE not in question:
        return f"{IMAGE}\n" * num_pictures + question
    num_marks = question.count(IMAGE)
    if num_marks != num_pictures:
        raise ValueError(
            f"the question has {num_marks} {IMAGE} mark(s) for {num_pictures} picture(s): every picture needs one "
            "mark, or leave all marks out to have the pictures in front of the question"
        )
    return question
