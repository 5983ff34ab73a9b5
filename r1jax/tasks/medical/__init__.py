"""Chest CT with a patient record: findings of a nodule and its malignancy."""
