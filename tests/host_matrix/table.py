"""The table in the README."""

WORKS, SAME, REFUSED, ABSENT = "yes", "same", "refused", "-"
FAILS, LIKE_STOCK = "fails", "as train_vae"
