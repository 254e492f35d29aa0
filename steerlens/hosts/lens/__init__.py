"""TransformerLens: TransformerBridge and HookedTransformer."""
