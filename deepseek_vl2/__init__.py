"""DeepSeek-VL2 vision-language models on current transformers: library, command line and web page.

Importing this package has no side effect. `deepseek_vl2.models` holds the model and its processor and
registers both with transformers' Auto classes. `deepseek_vl2.nano.path()` is the bundled checkpoint.
"""

from deepseek_vl2 import nano

__all__ = ["__version__", "nano"]

__version__ = "0.1.0"
