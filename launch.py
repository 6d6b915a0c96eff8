"""The front door: ``python launch.py --experiment=fusion_ablation --config.budget.steps=200``.

Imports are light on purpose: data workers import this file again, and ``--list`` should answer at once.
"""

from __future__ import annotations

import sys

from vla_jax.errors import UserError

if __name__ == "__main__":
    from vla_jax.launching import main

    try:
        main(sys.argv[1:])
    except UserError as error:
        # What the user can mend is one clear line, not a traceback.
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
