"""This package turns a base model into a chatbot, by supervised fine-tuning."""
