"""Analysis of models, evaluation, pictures and reports."""
