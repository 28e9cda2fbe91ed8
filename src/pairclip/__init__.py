"""Fine-tune the image tower of a CLIP model on any labelled image dataset, with pairs of images.

Public names are loaded on first use (PEP 562), so `import pairclip` imports nothing heavy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pairclip._version import __version__ as __version__

if TYPE_CHECKING:
    from pairclip.alignment import (
        Alignment as Alignment,
        align as align,
    )
    from pairclip.callbacks import (
        Callback as Callback,
        CollapseMonitor as CollapseMonitor,
        EarlyStopping as EarlyStopping,
        FitState as FitState,
        Tracker as Tracker,
        WeightAverage as WeightAverage,
    )
    from pairclip.checkpoints import (
        Checkpoint as Checkpoint,
        best_checkpoint as best_checkpoint,
        newest_checkpoint as newest_checkpoint,
    )
    from pairclip.collection import (
        check_collection as check_collection,
    )
    from pairclip.datasets import (
        LabelledImages as LabelledImages,
        TableDataset as TableDataset,
        check_images as check_images,
        class_names_of as class_names_of,
        labels_of as labels_of,
    )
    from pairclip.embedding import (
        embed_images as embed_images,
    )
    from pairclip.evaluation import (
        Evaluation as Evaluation,
        choose_threshold as choose_threshold,
        evaluate as evaluate,
        evaluate_embeddings as evaluate_embeddings,
    )
    from pairclip.features import (
        CachedFeatures as CachedFeatures,
        cache_features as cache_features,
    )
    from pairclip.finetuner import (
        Finetuner as Finetuner,
    )
    from pairclip.history import (
        History as History,
    )
    from pairclip.index import (
        FaissIndex as FaissIndex,
        ImageIndex as ImageIndex,
        Match as Match,
        search_recall as search_recall,
    )
    from pairclip.losses import (
        AllPairsCosineLoss as AllPairsCosineLoss,
        CosinePairLoss as CosinePairLoss,
        PreservingLoss as PreservingLoss,
        TargetSimilarityLoss as TargetSimilarityLoss,
        all_pairs_cosine_loss as all_pairs_cosine_loss,
        cosine_pair_loss as cosine_pair_loss,
        hierarchy_targets as hierarchy_targets,
        multi_label_targets as multi_label_targets,
        on_pairs as on_pairs,
        target_similarity_loss as target_similarity_loss,
    )
    from pairclip.plots import (
        plot_class_similarity as plot_class_similarity,
        plot_history as plot_history,
        plot_pair_histogram as plot_pair_histogram,
        plot_retrieval as plot_retrieval,
        plot_similarity_matrix as plot_similarity_matrix,
    )
    from pairclip.recipes import (
        Recipe as Recipe,
        RecipeComparison as RecipeComparison,
        RecipeResult as RecipeResult,
        compare_recipes as compare_recipes,
        default_recipes as default_recipes,
        imprint as imprint,
        tune as tune,
    )
    from pairclip.report import (
        write_check_report as write_check_report,
        write_report as write_report,
        write_search_report as write_search_report,
    )
    from pairclip.retrieval import (
        PairSeparation as PairSeparation,
        knn_accuracy as knn_accuracy,
        map_at_r as map_at_r,
        mean_average_precision as mean_average_precision,
        pair_separation as pair_separation,
        precision_at_k as precision_at_k,
        r_precision as r_precision,
        recall_at_k as recall_at_k,
        retrieval_figures as retrieval_figures,
    )
    from pairclip.saliency import (
        occlusion_saliency as occlusion_saliency,
    )
    from pairclip.samplers import (
        ClassBalancedSampler as ClassBalancedSampler,
        GroupSampler as GroupSampler,
        PairSampler as PairSampler,
    )
    from pairclip.similarity import (
        class_similarity_matrix as class_similarity_matrix,
        nearest_neighbors as nearest_neighbors,
        similarity_matrix as similarity_matrix,
    )
    from pairclip.towers import (
        VisionTower as VisionTower,
        interpolate as interpolate,
        layer_decay as layer_decay,
        load_tower as load_tower,
    )

# Module -> the public names that it defines; the block above says the same to type checkers.
_EXPORTS: dict[str, tuple[str, ...]] = {
    "losses": (
        "AllPairsCosineLoss",
        "CosinePairLoss",
        "PreservingLoss",
        "TargetSimilarityLoss",
        "all_pairs_cosine_loss",
        "cosine_pair_loss",
        "hierarchy_targets",
        "multi_label_targets",
        "on_pairs",
        "target_similarity_loss",
    ),
    "samplers": ("ClassBalancedSampler", "GroupSampler", "PairSampler"),
    "similarity": ("class_similarity_matrix", "nearest_neighbors", "similarity_matrix"),
    "retrieval": (
        "PairSeparation",
        "knn_accuracy",
        "map_at_r",
        "mean_average_precision",
        "pair_separation",
        "precision_at_k",
        "r_precision",
        "recall_at_k",
        "retrieval_figures",
    ),
    "datasets": ("LabelledImages", "TableDataset", "check_images", "class_names_of", "labels_of"),
    "towers": ("VisionTower", "interpolate", "layer_decay", "load_tower"),
    "embedding": ("embed_images",),
    "saliency": ("occlusion_saliency",),
    "features": ("CachedFeatures", "cache_features"),
    "evaluation": ("Evaluation", "choose_threshold", "evaluate", "evaluate_embeddings"),
    "collection": ("check_collection",),
    "alignment": ("Alignment", "align"),
    "history": ("History",),
    "checkpoints": ("Checkpoint", "best_checkpoint", "newest_checkpoint"),
    "callbacks": (
        "Callback",
        "CollapseMonitor",
        "EarlyStopping",
        "FitState",
        "Tracker",
        "WeightAverage",
    ),
    "finetuner": ("Finetuner",),
    "recipes": (
        "Recipe",
        "RecipeComparison",
        "RecipeResult",
        "compare_recipes",
        "default_recipes",
        "imprint",
        "tune",
    ),
    "index": ("FaissIndex", "ImageIndex", "Match", "search_recall"),
    "plots": (
        "plot_class_similarity",
        "plot_history",
        "plot_pair_histogram",
        "plot_retrieval",
        "plot_similarity_matrix",
    ),
    "report": ("write_check_report", "write_report", "write_search_report"),
}
_MODULE_OF = {name: module for module, names in _EXPORTS.items() for name in names}

__all__ = ["__version__", *sorted(_MODULE_OF)]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*_EXPORTS, *__all__})
