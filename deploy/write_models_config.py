"""Write TensorFlow Serving's model config for every model in a folder: write_models_config.py FOLDER OUTPUT.

Plain Python, for machines that have no more than that. The paths in it are those in the container: /models/<name>.
"""

import sys
from pathlib import Path

MAX_VERSION = 2**63 - 1  # an int64 in TensorFlow Serving's protocol
ENTRY = '  config {{\n    name: "{name}"\n    base_path: "/models/{name}"\n    model_platform: "tensorflow"\n  }}\n'


def main(models_dir: Path, output: Path) -> int:
    """Write `output`; returns the exit code."""
    files = [*models_dir.glob("*/[0-9]*/saved_model.pb"), *models_dir.glob("*/[0-9]*/saved_model.pbtxt")]
    names = sorted({file.parent.parent.name for file in files if is_version(file.parent.name)})
    for name in [name for name in names if not is_text(name)]:
        print(f"{name!a} is left out: the name is not valid UTF-8; rename the folder", file=sys.stderr)
        names.remove(name)
    if not names:
        print(
            f"error: no exported model in {models_dir}; `make train` makes one, `make demo` a small one",
            file=sys.stderr,
        )
        return 1
    entries = "".join(ENTRY.format(name=escape(name)) for name in names)
    partial = output.with_name(f".{output.name}.partial")
    partial.write_text(f"model_config_list {{\n{entries}}}\n", encoding="utf-8")
    partial.rename(output)
    print(f"{output}: {', '.join(map(escape, names))}")
    return 0


def is_version(name: str) -> bool:
    """Whether a folder of this name is a version for the servers: digits, at most the largest int64."""
    return name.isascii() and name.isdigit() and int(name) <= MAX_VERSION


def is_text(name: str) -> bool:
    """Whether the name of a file is UTF-8: Python reads other bytes as surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


def escape(name: str) -> str:
    """Return `name` as the inside of a string of the protocol buffer text format."""
    return "".join(f"\\{ord(c):03o}" if c in '"\\' or c < " " or c == "\x7f" else c for c in name)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
