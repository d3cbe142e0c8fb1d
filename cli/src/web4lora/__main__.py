"""Where the command `web4lora` starts; the rest is loaded so that Ctrl-C meanwhile prints no stack trace."""

from __future__ import annotations

import sys

_INTERRUPTED = 130


def main() -> None:
    """Load the commands and run the one that was asked for."""
    try:
        from web4lora.main import main as run
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)
    run()


if __name__ == "__main__":
    main()
