"`python -m ddpo_tutorial` is `ddpo_train`, where that command is not on the path."

import sys

from ddpo_tutorial.command import main

if __name__ == '__main__':
    sys.exit(main())
