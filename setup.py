"""Packaging: `pip install .[pipeline,serving]` is all, `.[serving]` what answers requests; `local` has emulators, `dev` tools."""

from setuptools import find_packages, setup

setup(
    name="adstocrat",
    version="0.1.0",
    description="Monthly batch scoring of ads: rows and images in, click probabilities in BigQuery and behind REST out",
    license="Apache-2.0",
    python_requires=">=3.11,<3.12",
    packages=find_packages(include=["schemas", "schemas.*", "model", "model.*", "beam_jobs", "beam_jobs.*", "serving", "serving.*"]),
    package_data={"schemas": ["*.pbtxt", "tables/*.json", "audits/*.sql", "views/*.sql"], "beam_jobs": ["templates/*"]},
    # What schemas/ and serving/ need, so that `pip install .[serving]` brings nothing of what trains and scores.
    install_requires=["google-cloud-storage>=3.17", "google-crc32c"],
    extras_require={
        "serving": ["httptools", "prometheus-client", "urllib3>=2", "uvicorn>=0.54,<0.55", "uvloop"],
        "pipeline": [
            "apache-beam[gcp]>=2.77,<2.78",
            "google-cloud-bigquery>=3.47",
            "jinja2",
            "keras>=3.15",
            "matplotlib>=3.11",
            "numpy",
            "pillow",
            "pyarrow>=25",
            "pyyaml",
            "rich",
            "tensorflow>=2.21,<2.22",
            "tensorflow-metadata>=1.21",
            "tfx-bsl>=1.21",
        ],
        "local": ["bqemulator", "duckdb-extension-spatial", "duckdb-extensions", "gcp-storage-emulator"],
        "dev": ["hypothesis", "mypy", "playwright", "pytest", "pytest-xdist", "ruff", "schemathesis", "types-PyYAML"],
        "tfma": ["tensorflow-model-analysis>=0.52,<0.53"],
    },
    entry_points={"console_scripts": ["adstocrat=beam_jobs.cli:main"]},
)
