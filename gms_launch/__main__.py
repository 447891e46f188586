"""`python -m gms_launch` is the `gms-launch` command."""

from gms_launch.cli.main import main

if __name__ == "__main__":
    main()
