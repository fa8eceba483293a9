"""Reference implementations of the algorithms that teach a language model when to think, one file each."""

from pathlib import Path

__version__ = "0.1.0"

# setup.py installs the top-level folder kernels/ as adaptive_reasoning.kernels. A plain checkout on PYTHONPATH has no
# installed copy, so the checkout joins the package path: `import adaptive_reasoning.kernels` finds the folder there.
_checkout = Path(__file__).resolve().parent.parent
if not (Path(__file__).parent / "kernels").is_dir() and (_checkout / "kernels" / "__init__.py").is_file():
    __path__.append(str(_checkout))
