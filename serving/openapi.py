"""The service's own description, OpenAPI 3.1; a test holds the running service to it."""

from typing import Any

_MONTH = {"type": "string", "pattern": r"^\d{4}-(0[1-9]|1[0-2])$", "examples": ["2026-10"]}
_PROBABILITY = {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}
_STRING = {"type": "string"}
_NULLABLE = {"type": ["string", "null"]}
_RUN: dict[str, Any] = {
    "month": _MONTH,
    "run_id": {**_STRING, "description": "The run that was published."},
    "encoder_version": _STRING,
    "model_version": {**_STRING, "description": "The ranker that gave the probabilities."},
    "age_days": {"type": "number", "description": "Days since the month's table was built."},
}
_ROW: dict[str, Any] = {
    "key": {**_STRING, "description": "The ad: its key column, or its key columns joined by |, with \\ and | escaped."},
    "p_click": {**_PROBABILITY, "description": "That one impression at the reference position is clicked."},
    "creative": {**_NULLABLE, "description": "SHA-256 of the image's bytes in hexadecimal."},
    "image_status": _STRING,
    "score_status": {"enum": ["ok", "no_image", "fallback"]},
}
_HEADERS = {
    "ETag": {"description": "The run, weak: of one run's answers only the age changes.", "schema": _STRING},
    "Last-Modified": {"description": "When the month's table was built.", "schema": _STRING},
    "Cache-Control": {"description": "no-cache: keep it, and ask whether it is still so.", "schema": _STRING},
}
_RETRY = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}}}


def document(max_keys: int, max_body_bytes: int, tokens: bool) -> dict[str, Any]:
    """The OpenAPI document.

    Args:
        max_keys: of one batch.
        max_body_bytes: of one request.
        tokens: whether a request needs one.
    """
    key = {
        "name": "key",
        "in": "path",
        "required": True,
        "schema": {"type": "string", "minLength": 1},
        "description": "Percent-encoded UTF-8; a slash is %2F. A key of dots alone is asked for in a batch.",
    }
    etag = {"name": "If-None-Match", "in": "header", "schema": _STRING, "description": "An ETag: 304 while its run is served."}
    keys = {"type": "array", "items": _STRING, "maxItems": max_keys}
    scores = {"type": "array", "items": {"anyOf": [{"$ref": "#/components/schemas/Row"}, {"type": "null"}]}, "maxItems": max_keys}
    get = {
        "operationId": "get_score",
        "summary": "One ad's score",
        "parameters": [key, etag],
        "responses": {
            "200": {"headers": _HEADERS, **_json("The row.", "Score")},
            "304": {"description": "The run that the ETag names is still served.", "headers": _HEADERS},
            **_problems(400, 404, tokens=tokens),
        },
    }
    lookup = {
        "operationId": "lookup_scores",
        "summary": f"Up to {max_keys:,} ads' scores, in the order of their keys; null for an unknown one",
        "requestBody": {"required": True, "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Keys"}}}},
        "responses": {"200": _json("All rows, of one run.", "Batch"), **_problems(400, 413, tokens=tokens)},
        "description": f"Any key can be asked for here, and one several times. A body has at most {max_body_bytes:,} bytes.",
    }
    status = {
        "operationId": "get_status",
        "summary": "What is served",
        "responses": {"200": _json("The run.", "Status"), **_problems(tokens=tokens)},
    }
    schemas = {
        "Row": _object(_ROW, description="A row of the score table, with the contract's key and segment columns."),
        "Score": _object({**_ROW, **_RUN}),
        "Keys": _object({"keys": keys}, additionalProperties=False),
        "Batch": _object({**_RUN, "scores": scores}),
        "Status": _object({**_RUN, "rows": {"type": "integer", "minimum": 0}}),
        "Problem": _object({"type": _STRING, "title": _STRING, "status": {"type": "integer"}, "detail": _STRING}),
    }
    described: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "Adstocrat", "version": "1", "summary": "Click probabilities of ads, of the month that is published."},
        "paths": {"/v1/scores/{key}": {"get": get}, "/v1/scores:lookup": {"post": lookup}, "/v1/status": {"get": status}},
        "components": {"schemas": schemas},
    }
    if tokens:
        described["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer", "description": "id.secret"}}
        described["security"] = [{"token": []}]
    return described


def _object(properties: dict[str, Any], **more: Any) -> dict[str, Any]:
    """An object that has all of its properties always."""
    return {"type": "object", "properties": properties, "required": list(properties), **more}


def _json(description: str, schema: str, kind: str = "application/json") -> dict[str, Any]:
    return {"description": description, "content": {kind: {"schema": {"$ref": f"#/components/schemas/{schema}"}}}}


def _problems(*statuses: int, tokens: bool) -> dict[str, Any]:
    # Headers that are too long or too slow are refused on every path, before it is known.
    answers = {
        400: "The request is not as described here.",
        401: "No token, or one that is not known (any more).",
        404: "The month has no such key.",
        405: "Not with this method.",
        408: "The request did not come in time.",
        413: "The body is too long.",
        431: "The headers are too long.",
        503: "No month is loaded yet, or there are too many connections.",
    }
    told = sorted({*statuses, 405, 408, 431, 503, *([401] if tokens else [])})
    problems = {str(status): _json(answers[status], "Problem", "application/problem+json") for status in told}
    problems["503"]["headers"] = _RETRY
    return problems
