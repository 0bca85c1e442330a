"""Other trainers, driven on the same rows and settings as ours."""
