"""Supervised fine-tuning: from base model to chatbot."""
