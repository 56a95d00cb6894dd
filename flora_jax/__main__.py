"""The console command `flora_jax`, and `python -m flora_jax`; help comes at once."""

import sys

from flora_jax import help
from flora_jax.cluster import interrupts, memory
from flora_jax.io.paths import check_are_there


def run() -> None:
    """Runs the command line."""
    if help.is_asked_for(sys.argv[1:]):
        with interrupts.ended_with_its_reader():
            print(help.text())
        return
    check_are_there(sys.argv[1:])
    memory.use_large_pages()
    interrupts.answer_at_once()
    from flora_jax import main  # takes seconds: JAX

    main.run()


if __name__ == "__main__":
    run()
