"""A small recurrent PPO trainer on top of the package: `python -m metta_fastagent.train --help`."""
