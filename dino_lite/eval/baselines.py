"""What a backbone is compared with before it may be called trained: raw pixels, and itself without
training.
"""

from __future__ import annotations

from typing import Any

from dino_lite.contracts import Backbone
from dino_lite.data.clean import CleanData
from dino_lite.eval.features import pixel_features
from dino_lite.eval.knn import KNN


def knn_against_baselines(
    trained: Backbone, untrained: Backbone, data: CleanData
) -> dict[str, Any]:
    """k-NN top-1 in percent at k = 20: `knn_raw_pixels` (32x32, mean image subtracted),
    `knn_untrained`, `knn_trained`.
    """
    knn = KNN(ks=[20])
    after = knn(trained, data)
    return {
        "knn_raw_pixels": round(knn.score(*pixel_features(data))["top1"], 2),
        "knn_untrained": round(knn(untrained, data)["top1"], 2),
        "knn_trained": round(after["top1"], 2),
        "knn_protocol": f"k={after['top1_k']}, {after['protocol']}",
    }
