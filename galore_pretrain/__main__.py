"""``python -m galore_pretrain`` is the command line: what torchrun starts."""

from galore_pretrain.cli import main

main()
