"""Whose fault it is when vLLM's handlers raise instead of answering."""


def is_refusal(error: Exception) -> bool:
    """Whether vLLM's error handling answers an exception with a status below 500: the request was at fault.

    Args:
        error: what a route function of vLLM's raised.
    """
    # Where routes run, vLLM is loaded; who only imports them need not load it.
    from vllm.entrypoints.serve.exception_handling.error_response import create_error_response

    return int(create_error_response(error).error.code) < 500
