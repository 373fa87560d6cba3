"""`python -m kpcore`: the command `kpcore`, also where its script is not on the PATH."""

import sys

from kpcore_command import main

sys.exit(main())
