"""The main job, ``python -m gemini.train``: a GPT trained on real text in less memory than its model data need."""
