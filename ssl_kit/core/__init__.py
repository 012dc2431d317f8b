"""What every other part stands on: random numbers, files, spectra, the terminal. Imports nothing of ours."""

light = False  # whether this process does without torch for good, as that of `ssl-kit index` does
