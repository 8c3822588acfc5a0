"""Train the demo model digits_mlp: 8x8 pixels in 0..16 to one of ten digits, a dense 64-128-10 network.

Run: python deploy/train/digits_mlp.py [--models DIR]
"""

from demo_model import SEED, publish, split
from sklearn.datasets import load_digits
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler

if __name__ == "__main__":
    features, digits = load_digits(return_X_y=True)
    # The optimizer stops by itself after about 260 epochs; reaching the bound would warn.
    network = MLPClassifier(hidden_layer_sizes=(128,), alpha=0.01, max_iter=500, random_state=SEED)
    publish("digits_mlp", make_pipeline(MinMaxScaler(), network), split(features, digits, stratify=True))
