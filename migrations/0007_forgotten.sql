-- Retention drops an event by its delivery. Failed events of forgotten conversations had none, so they stayed for good.
INSERT INTO deliveries (conversation, from_event, through, delivered_at, effect)
    SELECT e.conversation, e.id, e.id, c.forgotten_at, 'forgotten'
    FROM events e JOIN conversations c ON c.id = e.conversation
    WHERE c.forgotten_at IS NOT NULL AND NOT EXISTS (
        SELECT 1 FROM deliveries WHERE conversation = e.conversation AND e.id BETWEEN from_event AND through);
