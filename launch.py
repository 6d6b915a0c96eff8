"""The front door: ``python launch.py --experiment=fusion_ablation --config.budget.steps=200``.

Imports are light on purpose: data workers import this file again, and ``--list`` should answer at once.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    from vla_jax.launching import command

    command(sys.argv[1:])
