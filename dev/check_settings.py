"""Whether a script takes the settings that a launcher has for it, without running it: if not, a line and exit code 2.

dev/stages.sh calls it for DRY_RUN=1, with the command that would run:

    torchrun --standalone --nproc_per_node=8 -m scripts.base_train -- --depth=20
"""

import sys
from pathlib import Path

from nanochat.common import UserError, run_main
from nanochat.configurator import parse_args, read_block


def main() -> None:
    module, *words = sys.argv[sys.argv.index("-m") + 1 :]
    try:
        parse_args(read_block(Path(f"{module.replace('.', '/')}.py")), words)
    except UserError as error:
        raise UserError(f"{module}: {error}") from None


if __name__ == "__main__":
    run_main(main)
