"""What every other part stands on: random numbers, files, spectra, the terminal. Imports nothing of ours."""
