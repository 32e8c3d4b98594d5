"""The coordinator: queue, dispatch, retry, store, health; never imports torch or cv2."""
