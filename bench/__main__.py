"""`python -m warpo.bench`: `warpo bench` for machines without what the engine needs."""

import sys

from warpo.bench.cli import main

sys.exit(main(sys.argv[1:]))
