import sys

from bnext.cli import main

sys.exit(main())
