"""`python -m reshard.runtime generate …`: the command line, for torchrun to start once per rank."""

from reshard.__main__ import main

if __name__ == "__main__":
    main()
