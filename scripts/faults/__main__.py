"""What users and machines do to a training, done on purpose and counted: nothing may hang, be lost or be wrong.

    python scripts/faults NAME [--json FILE]     NAME is a file of this folder; see its --help

Each is a module with ``add_arguments(parser)`` and ``run(arguments) -> dict``, whose ``"ok"`` says whether all held.
"""

import argparse
import importlib
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[1:1] = [str(HERE.parents[1] / "tests"), str(HERE.parents[1])]


def names() -> list[str]:
    return sorted(path.stem for path in HERE.glob("*.py") if not path.stem.startswith("_"))


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="faults", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="name", required=True)
    modules = {name: importlib.import_module(name) for name in names()}
    for name, module in modules.items():
        command = commands.add_parser(
            name, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.add_arguments(command)
        command.add_argument("--json", type=Path, metavar="FILE", help="write the counts there, too")
    arguments = parser.parse_args()
    result = modules[arguments.name].run(arguments)
    print(json.dumps(result, indent=1))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
