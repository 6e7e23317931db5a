"""Small inputs of batch runs, and a stand-in for the model."""

import random

from deepseek_vl2.nano.scenes import random_scene

SIZES = [(112, 112), (224, 112), (112, 224), (150, 130), (112, 112), (300, 90)]


def save_pictures(folder, count):
    """Pictures of different lengths in tokens, `00.png` and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number in range(count):
        path = folder / f"{number:02}.png"
        random_scene(random.Random(number), size=SIZES[number % len(SIZES)]).draw().save(path)
        paths.append(path)
    return paths


def save_pdf(path, num_pages, **options):
    """A PDF of pages that are pictures of different sizes."""
    pages = [random_scene(random.Random(n), size=(100 + 10 * n, 120)).draw() for n in range(num_pages)]
    pages[0].save(path, save_all=True, append_images=pages[1:], resolution=72, **options)
    return path
