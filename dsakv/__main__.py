"""``python -m dsakv``."""

from dsakv.cli import main

main()
