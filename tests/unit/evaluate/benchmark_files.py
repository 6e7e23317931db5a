"""Small files of benchmarks, as the tests of their readers need them."""

import base64
import csv
import io
import json

from PIL import Image

from deepseek_vl2.evaluate.readers import choose_format, read_samples

WIDTH, HEIGHT = 60, 40


def take_all(sample):
    """A task's preparation that refuses nothing and changes nothing."""
    return sample


def png(color="red", size=(WIDTH, HEIGHT)):
    data = io.BytesIO()
    Image.new("RGB", size, color).save(data, "PNG")
    return base64.b64encode(data.getvalue()).decode()


def read(folder, name, content, form=None, prepare=take_all, **options):
    path = folder / name
    path.write_text(content, encoding="utf-8")
    return read_samples(path, choose_format(path, form), prepare, **options)


def tsv(*rows):
    text = io.StringIO()
    columns = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, columns, delimiter="\t", lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def lines(*documents):
    return "".join((doc if isinstance(doc, str) else json.dumps(doc)) + "\n" for doc in documents)
