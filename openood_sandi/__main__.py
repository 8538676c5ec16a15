"""``python -m openood_sandi``: see :mod:`openood_sandi.command`."""

import sys

from openood_sandi.command import main

sys.exit(main())
