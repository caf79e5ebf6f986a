"""`python -m train.study`."""

import sys

from train.study.command import main

sys.exit(main())
