"""`python -m kvpo_trainer` is `kvpo-train`."""

import sys

from kvpo_trainer.cli import main

sys.exit(main())
