"""Write TensorFlow Serving's model config for every model in a folder: write_models_config.py FOLDER OUTPUT.

Plain Python, for machines that have no more than that. The paths in it are those in the container: /models/<name>.
"""

import sys
from pathlib import Path

ENTRY = '  config {{\n    name: "{name}"\n    base_path: "/models/{name}"\n    model_platform: "tensorflow"\n  }}\n'


def main(models_dir: Path, output: Path) -> int:
    """Write `output`; returns the exit code."""
    files = [*models_dir.glob("*/[0-9]*/saved_model.pb"), *models_dir.glob("*/[0-9]*/saved_model.pbtxt")]
    names = sorted({file.parent.parent.name for file in files if file.parent.name.isdigit()})
    if not names:
        print(
            f"error: no exported model in {models_dir}; `make train` makes one, `make demo` a small one",
            file=sys.stderr,
        )
        return 1
    entries = "".join(ENTRY.format(name=name) for name in names)
    partial = output.with_name(f".{output.name}.partial")
    partial.write_text(f"model_config_list {{\n{entries}}}\n")
    partial.rename(output)
    print(f"{output}: {', '.join(names)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
