"""Quality on real images: a small LLaVA that forgets, and the accuracy of every way to repair it.

``scenes`` draws prompts over scikit-learn's handwritten digits, ``tinyllava`` builds the model and
its processor from transformers' classes, ``training`` makes the base and the fine-tuned
checkpoint, ``evaluation`` measures accuracy by generation, ``baselines`` holds the published
merge rules.
"""
