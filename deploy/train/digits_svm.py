"""Train the demo model digits_svm: 8x8 pixels in 0..16 to one of ten digits, an RBF support vector machine.

The probabilities are sigmoids fitted to the decision function by cross-validation, normalised to sum to one. The
prediction of that calibrated classifier is the class of highest probability, by definition; the bare SVC's prediction,
a vote among pairs of classes, is not asked for.

Run: python deploy/train/digits_svm.py [--models DIR]
"""

from demo_model import publish, split
from sklearn.calibration import CalibratedClassifierCV
from sklearn.datasets import load_digits
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler
from sklearn.svm import SVC

if __name__ == "__main__":
    features, digits = load_digits(return_X_y=True)
    # ensemble=False fits one machine to all training rows: one set of support vectors in the graph, not five.
    classifier = CalibratedClassifierCV(SVC(C=10, gamma=0.05), method="sigmoid", cv=5, ensemble=False)
    publish("digits_svm", make_pipeline(MinMaxScaler(), classifier), split(features, digits, stratify=True))
