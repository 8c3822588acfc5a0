"""Train the demo model diabetes: ten measures of a patient to the disease's progress in a year, linear regression.

The measures are the raw ones (years, blood pressure, ...), not the standardised ones of scikit-learn's default.

Run: python deploy/train/diabetes.py [--models DIR]
"""

from demo_model import publish, split
from sklearn.datasets import load_diabetes
from sklearn.linear_model import LinearRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

if __name__ == "__main__":
    features, progress = load_diabetes(return_X_y=True, scaled=False)
    publish("diabetes", make_pipeline(StandardScaler(), LinearRegression()), split(features, progress, stratify=False))
