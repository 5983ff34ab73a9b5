"""The simple models that `records.py` sets beside the records task; scikit-learn and LightGBM, not commands."""

import numpy as np
import pyarrow.parquet as pq

from r1jax.data.records import RecordCases, Records
from r1jax.data.stock_features import COUNTS

BOOSTING = {
    "objective": "binary",
    "learning_rate": 0.02,
    "num_leaves": 15,
    "min_child_samples": 60,
    "lambda_l2": 10.0,
    "bagging_fraction": 0.8,
    "bagging_freq": 1,
    "feature_fraction": 0.6,
    "verbose": -1,
}
TREES = 450
SEEDS = 3
STOCK_BOOSTING = BOOSTING | {"num_leaves": 7, "min_child_samples": 150, "feature_fraction": 0.4}
STOCK_TREES = 200


def boosted(train: RecordCases, judged: RecordCases) -> dict[str, np.ndarray]:
    """LightGBM on all 23 columns of the file, sex and marital status too, and six summaries of them.

    Args:
      train: Records to learn from.
      judged: Records to score, of the same file.

    Returns:
      By name, the probability of each class, the mean of `SEEDS` models.
    """
    import lightgbm

    cells = pq.read_table(train.name.rpartition(",")[0])
    raw = np.stack([cells[f"X{i}"].to_numpy().astype(np.float64) for i in range(1, 24)], axis=1)
    limit, status, bill, paid = raw[:, :1], raw[:, 5:11], raw[:, 11:17], raw[:, 17:23]
    summaries = [
        status.max(axis=1),
        status.mean(axis=1),
        (status > 0).sum(axis=1),
        bill[:, 0] / limit[:, 0],
        (bill / limit).mean(axis=1),
        paid.sum(axis=1) / np.maximum(bill.sum(axis=1), 1),
    ]
    told, label = np.column_stack([raw, *summaries]), train.records.label
    data = lightgbm.Dataset(told[train.rows], label[train.rows])
    models = [lightgbm.train(BOOSTING | {"seed": seed}, data, TREES) for seed in range(SEEDS)]
    risk = np.mean([model.predict(told[judged.rows]) for model in models], axis=0)
    return {"LightGBM, 23 columns and 6 summaries": np.stack([1 - risk, risk], axis=1)}


def svm(train: RecordCases, judged: RecordCases) -> dict[str, np.ndarray]:
    """TF-IDF of words, pairs and pieces of words, and a linear SVM.

    Args:
      train: Sentences to learn from.
      judged: Sentences to score.

    Returns:
      By name, 1 for the class that is called and 0 for the others: of the sentences of the file alone, and where the
      records have more, of all that the model learns from, weighted by how far annotators agreed.
    """
    records, rows = train.records, train.rows
    own = rows if records.beside is None else rows[~records.beside[rows]]
    called = {"TF-IDF, linear SVM": _svm(records, own, np.ones(len(own)), judged)}
    if records.agreed is not None:
        weight = 2 * records.agreed[rows].astype(np.float64) - 1
        called["TF-IDF, linear SVM, by agreement"] = _svm(records, rows, weight, judged)
    return called


def _svm(records: Records, rows: np.ndarray, weight: np.ndarray, judged: RecordCases) -> np.ndarray:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.pipeline import make_pipeline, make_union
    from sklearn.svm import LinearSVC

    model = make_pipeline(
        make_union(
            TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True),
            TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), min_df=3, sublinear_tf=True),
        ),
        LinearSVC(C=0.5),
    )
    model.fit([records.text[row] for row in rows], records.label[rows], linearsvc__sample_weight=weight)
    return np.eye(3)[model.predict(_texts(judged))]


def stock_peers(train: RecordCases, judged: RecordCases) -> dict[str, np.ndarray]:
    """Logistic regression of the prices' numbers, of the tweets, and of both, and LightGBM on all numbers.

    Args:
      train: Days of stocks to learn from.
      judged: Days to score.

    Returns:
      By name, the probability of each class.
    """
    import lightgbm
    from scipy import sparse
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    words, scale = TfidfVectorizer(min_df=20, max_features=20000, sublinear_tf=True), StandardScaler()
    numbers = scale.fit_transform(train.records.table[train.rows]), scale.transform(judged.records.table[judged.rows])
    texts = words.fit_transform(_texts(train)), words.transform(_texts(judged))
    prices = [sparse.csr_matrix(table[:, :-COUNTS]) for table in numbers]
    tweets = [sparse.hstack([table[:, -COUNTS:], text]) for table, text in zip(numbers, texts, strict=True)]
    both = [sparse.hstack(pair) for pair in zip(prices, tweets, strict=True)]
    label = train.records.label[train.rows]
    found = {}
    for name, (own, other) in {"prices": prices, "tweets": tweets, "both": both}.items():
        model = LogisticRegression(C=0.01, max_iter=500).fit(sparse.csr_matrix(own), label)
        found[f"logistic regression, {name}"] = model.predict_proba(sparse.csr_matrix(other))
    data = lightgbm.Dataset(numbers[0], label)
    models = [lightgbm.train(STOCK_BOOSTING | {"seed": seed}, data, STOCK_TREES) for seed in range(SEEDS)]
    risk = np.mean([model.predict(numbers[1]) for model in models], axis=0)
    return found | {"LightGBM, numbers of prices and tweets": np.stack([1 - risk, risk], axis=1)}


def _texts(cases: RecordCases) -> list[str]:
    return [cases.records.text[row] for row in cases.rows]
