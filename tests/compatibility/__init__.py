"""What users have saved with a release, and what must come of it in every later one; one folder for each release."""
