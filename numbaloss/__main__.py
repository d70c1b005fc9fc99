"""python -m numbaloss"""

from .cli import main

raise SystemExit(main())
