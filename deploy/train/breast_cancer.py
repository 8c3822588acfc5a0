"""Train the demo model breast_cancer: 30 measures of cell nuclei to malignant (0) or benign (1), logistic regression.

Run: python deploy/train/breast_cancer.py [--models DIR]
"""

from demo_model import publish, split
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

if __name__ == "__main__":
    features, diagnoses = load_breast_cancer(return_X_y=True)
    publish(
        "breast_cancer",
        make_pipeline(StandardScaler(), LogisticRegression()),
        split(features, diagnoses, stratify=True),
    )
